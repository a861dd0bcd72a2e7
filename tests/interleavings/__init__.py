"""Every order in which the requests of two jobs can reach the service, with faults: what loads keeps loading.

`memory` is a service in memory, behind the real client: `transport.send` is all that is replaced. `explorer` runs
actors one request at a time and chooses which is next. `actors` are what users run: saves, loads, cleaning, deleting.
`checks` says what must hold after every request. ``python -m tests.interleavings`` explores all of it and writes the
table in ``docs/reliability.md``; `test_interleavings` runs a part, and shows that broken protocols are caught.
"""
