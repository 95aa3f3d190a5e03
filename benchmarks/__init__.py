"""Benchmarks: each compares two things in one run, under the settings that the command gives its processes."""

from isthmus.engines.threads import share_cores

share_cores()  # before torch is imported
