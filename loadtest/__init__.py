"""Which of two models is faster, which is worse, and is the difference real? Measured under load.

`config` what is asked · `dataset` prompts · `schedule` when each is sent, fixed by the seed ·
`targets` how · `runner` sending · `records` what was seen · `quality`, `statistics`, `summary` what
it means · `report` how it looks · `gate`, `compare` what follows from it.
"""
