"""The core blob client. It does not depend on torch.

``client`` is the public interface. Below it, ``download``, ``readahead``, ``upload``, ``commit`` and ``listing`` plan
and run transfers on the engine (the threads and memory budget of the process); ``retry`` decides what is retried.
``service`` signs requests and translates errors, ``transport`` and ``connection`` speak HTTP, ``credentials`` and
``authorizers`` provide tokens and SAS, and ``url`` parses URLs.
"""
