"""What an adversary can find out: attacks on a run, each through exactly what one party sees (``view``)."""
