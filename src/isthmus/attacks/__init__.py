"""What an adversary can find out: attacks on a run through exactly what each party sees."""
