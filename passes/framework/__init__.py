"""Define the base class of passes, their declared accuracy, the records of a run, and how passes are found by name."""
