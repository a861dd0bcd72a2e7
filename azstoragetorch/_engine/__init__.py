"""The ground floor: processes, cancellation, the byte budget, threads, and work that is claimed once.

Everything above is written with these and creates no locks.
"""
