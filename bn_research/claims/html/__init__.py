"""Pages of runs for a browser: `report.html` of one run, and an overview of many."""
