"""ckptd in other people's training loops, a module a library. None is imported unless you do."""
