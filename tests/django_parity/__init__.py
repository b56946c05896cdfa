"""What Django's own test suites say of signals, said again of ours.

Each test names the one of Django 5.2, or 6.1, that describes the behaviour: in `tests/signals`,
`tests/dispatch`, `tests/m2m_signals`, `tests/transaction_hooks` and `tests/test_utils`. All are
written anew, against a database. Where SQLAlchemy makes the behaviour differ, the test says how.
"""
