// How the search ranks pages: those that explain come before the reference, and records of the project come last.
// A name of the API that is asked for by its name stays on top.
var Scorer = {
  score: ([docname, title, anchor, descr, score, filename, kind]) => {
    if (kind === "object") return score;
    if (/^(start|guide|integrations)\/|^tasks$/.test(docname)) return score + 4;
    if (/^(reference\/(?!environment)|changelog|decisions|architecture|reliability)/.test(docname)) return score - 4;
    return score;
  },

  // The rest are the defaults of Sphinx.
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
