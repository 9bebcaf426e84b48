"""Error reports, kept for tests to read."""

reports = []


def report(message, *, exc_info=False):
    reports.append(message)
