"""Run the examples of the documentation as tests: every code block of a page, in order, in a folder of the page's own.

`blocks` reads the code blocks of a Markdown page, `compare` compares output with what the page shows, `page` runs
commands and Python for one page, and `plugin` makes all of that tests of pytest, through sybil.
"""
