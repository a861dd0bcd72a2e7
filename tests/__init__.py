"""Tests of azstoragetorch, laid out like the package."""
