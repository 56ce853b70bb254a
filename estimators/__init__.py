"""Estimators of how a student differs from its teacher and of how often either is right.

Plain functions over arrays and strings: token divergences (`divergence`), pass@k (`pass_at_k`),
majority votes and their agreement (`consensus`), the answers they are taken over
(`answers`) and which of those are the same (`canonical`), and intervals over prompts (`bootstrap`,
drawn from a seed that is given). Everything is numpy or the standard library; nothing here reads a
file or a clock, and an undefined value is `None` or an error, never a NaN or a 0.
"""
