"""How the site is built. What a page needs to be is in CONTRIBUTING.md."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from math import inf
from pathlib import Path
from typing import Any

from sphinx.pycode import ModuleAnalyzer
from sphinx.util.inspect import signature as signature_of
from sphinx.util.inspect import stringify_signature

import azstoragetorch

project = "azstoragetorch"
author = "azstoragetorch contributors"
version = release = azstoragetorch.__version__
copyright = author  # noqa: A001 - Sphinx's name for it

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_diagrams"]
myst_enable_extensions = ["colon_fence", "deflist", "fieldlist", "attrs_inline"]
myst_heading_anchors = 3

# Names in single backticks link to what they name, where that is ours; a misspelt :class: or :doc: is an error.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", r".*"),
    ("py:.*", r"(?!azstoragetorch\.).*"),  # of others: their sites are not asked
    ("py:.*", r"azstoragetorch\..*\._.*"),  # types that signatures show and nobody has to name
    ("py:.*", r"azstoragetorch\._.*"),
]

autodoc_mock_imports = [
    "lightning",
    "litdata",
    "ray",
    "torch_checkpointing",
    "transformers",
    "webdataset",
]  # only readers need them
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
napoleon_use_rtype = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80

html_theme = "furo"
html_title = "azstoragetorch"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_search_scorer = str(Path(__file__).parent / "_static/scorer.js")
html_copy_source = False
html_show_copyright = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5cad", "color-brand-content": "#0b5cad"},
    "dark_css_variables": {"color-brand-primary": "#6cb6ff", "color-brand-content": "#6cb6ff"},
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"

# The sidebar. The landing page is plain Markdown, which reads well on a code host; its contents are added here.
CONTENTS = {
    "Start": ["start/install", "start/credentials", "start/notebook", "tasks", "recipes"],
    "Guide": [
        "guide/blobio",
        "guide/urls",
        "guide/datasets",
        "guide/datapipes",
        "guide/nodes",
        "guide/filesystem",
        "guide/checkpoints",
        "guide/safetensors",
        "guide/deltas",
        "guide/resuming",
        "guide/scale",
        "guide/tuning",
        "guide/cli",
        "guide/troubleshooting",
    ],
    "Integrations": [
        "integrations/use-it-from",
        "integrations/fsdp",
        "integrations/lightning",
        "integrations/hugging-face",
        "integrations/webdataset",
        "integrations/litdata",
        "integrations/ray",
        "integrations/torch-checkpointing",
        "integrations/tensorboard",
        "integrations/kubernetes",
    ],
    "Coming from": ["coming-from/published", "coming-from/adlfs", "coming-from/others"],
    "How it works": ["architecture", "decisions", "reliability", "performance"],
    "Reference": [
        "reference/index",
        "reference/environment",
        "glossary",
        "changelog",
        "deprecation",
        "contributing",
        "security",
    ],
}


def add_contents(_app: Any, page: str, source: list[str]) -> None:
    """Append the table of contents to the landing page."""
    if page == "index":
        for caption, pages in CONTENTS.items():
            source[0] += "\n".join(["", "```{toctree}", f":caption: {caption}", ":hidden:", "", *pages, "```", ""])


# Users get objects of these classes from functions, methods, and frameworks, so their constructors are private.
NOT_CONSTRUCTED = {
    "azstoragetorch.datasets.Blob",
    "azstoragetorch.datasets.BlobDataset",
    "azstoragetorch.datasets.IterableBlobDataset",
    "azstoragetorch.filesystem.AzureBlobFile",
    "azstoragetorch.litdata.BlobDownloader",
    "azstoragetorch.torch_checkpointing.BlobStorage",
}


def show_signature(
    _app: Any, _what: str, name: str, value: Any, _options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Hide private constructors, and show the default values of a configuration, which come from the environment."""
    if name in NOT_CONSTRUCTED:
        return "", returns
    if signature in ("(*args: Any, **kwargs: Any)", "(*args, **kwargs)"):  # of a base class or metaclass, or a mock
        own = signature_of(value.__init__, bound_method=True)
        return stringify_signature(own, show_return_annotation=False), returns
    if name == "azstoragetorch.TransferConfig" and signature:
        for setting in fields(azstoragetorch.TransferConfig):
            if setting.default_factory is not MISSING:
                default = setting.default_factory()
                is_size = isinstance(default, int) and default >= 1 << 20
                signature = signature.replace("<factory>", f"{default >> 20} << 20" if is_size else repr(default), 1)
    return signature, returns


def hide_overloads(_app: Any) -> None:
    """Show methods of datasets with all their arguments: their overloads, which are for type checkers, hide them."""
    for module in ("azstoragetorch.datasets._map", "azstoragetorch.datasets._iterable"):
        analyzer = ModuleAnalyzer.for_module(module)
        analyzer.analyze()
        analyzer.overloads.clear()


# On a phone, long names break at their joints: after a dot, a slash, or an underscore, and between the words of camel
# case. Without <wbr>, browsers break them anywhere. In a sentence, only very long names break; others move to the next
# line.
CELL = re.compile(r"<(t[dh]|h1)\b.*?</\1>", re.DOTALL)
CODE = re.compile(r'<code class="[^"]*literal.*?</code>|<dt class="sig .*?</dt>', re.DOTALL)
EXAMPLE = re.compile(r"<pre>.*?</pre>", re.DOTALL)
URL = re.compile(r"\w+://[^\s<]+")
NAME = re.compile(r"[\w./-]+")
TEXT = re.compile(r">[^<]+<")
JOINT = re.compile(r"(?<=\w[._/])(?=[A-Za-z]{2})|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
SLASH = re.compile(r"(?<=[\w;]/)(?=&lt;|\w|\.)|(?<=@)(?=&lt;)|(?<=;\.)(?=\w)")
CALL = re.compile(r'(?<=\(</span>)|(?<=\)</span>)(?=<span class="o">\.)')
NARROW = re.compile(r"(?<=://)(?=&lt;)|(?<=\w{4}\()(?=\w)")


def with_breaks(html: str, shortest: float = inf) -> str:
    """*html* with places where URLs and names of *shortest* characters or more can break."""

    def in_text(text: re.Match[str]) -> str:
        names = NAME.sub(lambda name: JOINT.sub("<wbr>", name[0]) if len(name[0]) >= shortest else name[0], text[0])
        return URL.sub(lambda url: SLASH.sub("<wbr>", url[0]), names)

    return TEXT.sub(in_text, html)


def break_names(_app: Any, _page: str, _template: str, context: dict[str, Any], _doctree: Any) -> None:
    """Add places where names can break to a page, and to the titles of its neighbors."""
    body = context.get("body", "")
    body = EXAMPLE.sub(lambda example: CALL.sub("<wbr>", with_breaks(example[0])), body)
    body = CODE.sub(lambda code: with_breaks(code[0], 24), body)
    context["body"] = CELL.sub(lambda cell: NARROW.sub("<wbr>", with_breaks(cell[0], 10)), body)
    for neighbor in ("prev", "next"):
        if context.get(neighbor):
            title = with_breaks(f">{context[neighbor]['title']}<", 16)[1:-1]
            context[neighbor] = {**context[neighbor], "title": title}


def setup(app: Any) -> None:
    app.connect("builder-inited", hide_overloads)
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-signature", show_signature)
    app.connect("html-page-context", break_names)
