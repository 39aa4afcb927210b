"""What a page shows of runs, as JSON: one function for each thing it asks for. Needs no torch."""
