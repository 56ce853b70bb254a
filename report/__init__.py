"""How does a page show what was measured? What the export's report and the load test's share."""
