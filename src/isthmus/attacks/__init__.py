"""Attacks on a federation. Each attack sees a run only through the view of one adversary (``view``)."""
