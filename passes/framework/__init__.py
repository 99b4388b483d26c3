"""Define what a pass is, how exact it declares itself to be, what it reports, and how passes are found by name."""
