"""The site: its pages are run, its links followed, its reference compared with what is public."""
