"""Which of two models is faster, which is worse, and is the difference statistically significant?

`config` what is asked · `workload` what is sent, and when, fixed by the seed · `client` how it is
sent · `records` what was seen of it · `server_metrics` what the server says of itself · `analysis`
what it means · `verdicts` what follows · `report` how it is shown · `ledger` whether anything was
lost, duplicated or altered · `run` one load test from its settings to its folder.
"""
