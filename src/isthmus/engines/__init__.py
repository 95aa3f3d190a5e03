"""The processes of a federation: one role in this process, all roles on this machine, and a silo that uses a run."""
