"""Suites that several implementations of one interface inherit, so that they all keep the same promises."""
