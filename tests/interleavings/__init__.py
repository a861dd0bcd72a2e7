"""Every order in which the requests of two jobs can reach the service, with faults: checkpoints stay loadable.

`memory` is a service in memory, behind the real client: only `transport.send` is replaced. `explorer` runs actors one
request at a time and chooses the next one. `actors` are the operations of users: saves, loads, cleaning, deleting.
`checks` are the conditions that must hold after every request. ``python -m tests.interleavings`` explores everything
and writes the table in ``docs/reliability.md``; `test_interleavings` runs a part, and shows that broken protocols are
detected.
"""
