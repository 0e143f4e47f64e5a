"""What ``torch.func.vmap`` can't run, in the words of a module's author. torch's own stay in the error's cause."""

from __future__ import annotations

from torch import nn

OBSTACLES = (
    ("data-dependent control flow", "branches on a tensor's values, which differ between runs; use torch.where"),
    (".item()", "turns a tensor into a number, which differs between runs; keep it a tensor"),
    ("dynamic shape", "makes a shape that depends on a tensor's values; use torch.where or a mask"),
    ("randomness", "draws at random, so a run would depend on its neighbours; draw outside forward"),
)
IN_PLACE = ("inplace", "in-place", "broadcast shape")


def obstacle(error: Exception, owner: nn.Module) -> str:
    """What a module does that several networks can't do at once, and the change that mends it."""
    said = " ".join(str(error).split())
    for words, meaning in OBSTACLES:
        if words in said:
            return meaning
    buffers = [name for name, _ in owner.named_buffers(recurse=False)]
    if buffers and any(words in said for words in IN_PLACE):
        which = f"buffer {buffers[0]!r}" if len(buffers) == 1 else f"a buffer ({', '.join(map(repr, buffers))})"
        return f"writes into {which}, which all runs share; compute it anew in forward"
    reason = said.partition(". ")[0].rstrip(" .") or type(error).__name__
    return f"can't be run for several networks at once ({reason[:100]}); change it"
