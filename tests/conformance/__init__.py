"""Suites that several implementations of one interface inherit, so that all behave the same."""
