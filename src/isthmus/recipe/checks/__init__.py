"""Rules across tables, one file for each subject.

A check gets the tables that it compares and raises ``ValueError`` with the message ``key: reason; remedy``.
"""
