"""A grammar compiled in a process of its own first: one that takes too long, or breaks the compiler, ends that process.

The file is run by its path, and imports nothing of isthmus: the process is there in a tenth of a second.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

CPU_SECONDS = 3
"""Of the processor that a compilation may take."""
MAX_SECONDS = 15.0
"""By the clock: other processes may need the processor, too."""
MEMORY = 2 * 2**30
"""Bytes of address space."""
STACK = 4 * 2**20
"""Bytes: half of what threads have that compile a grammar that has passed."""
TOO_COMPLEX = "it is too complex to compile"


def new_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher for this grammar, with its first mask computed; ``get_error`` says what is wrong with the grammar."""
    limits = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher


def try_grammar(grammar: str) -> str:
    """What is wrong with a grammar as ``LLMatcher.grammar_from_json_schema`` writes them; empty: nothing."""
    command = [sys.executable, "-I", __file__]
    try:
        done = subprocess.run(
            command, input=grammar.encode(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=MAX_SECONDS
        )
    except subprocess.TimeoutExpired:
        return TOO_COMPLEX
    return done.stdout.decode(errors="replace") if done.returncode == 0 else TOO_COMPLEX


def _limit_process() -> None:
    try:
        import resource
    except ImportError:  # not a Unix: the time by the clock is the limit
        return
    for kind, most in ((resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (most, most))


def _main() -> int:
    _limit_process()
    grammar, found = sys.stdin.buffer.read().decode(), list[str]()
    threading.stack_size(STACK)

    def work(tokenizer: Any = "byte") -> None:
        found.append(new_matcher(LLTokenizer(tokenizer), grammar).get_error())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if not found:
        return 1
    sys.stdout.buffer.write(found[0].encode())
    return 0


if __name__ == "__main__":
    sys.exit(_main())
