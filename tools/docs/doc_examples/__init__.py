"""Run the examples of the documentation as tests: every code block of a page, in order, in a folder of the page's own.

    pytest README.md CONTRIBUTING.md docs       (--update-docs writes what was printed into the pages)

What a page may hold:

- `console`: lines that begin with `$ ` are commands, lines below are what they print. Folder and variables last for the
  page. A command may fail only if `$ echo $?` follows it. Lines that begin with `> ` continue a command.
- `python`: runs in one namespace per page. A `text` block right after it is what it prints. `>>>` examples are compared
  one by one; an exception is a line `Traceback (most recent call last):` and its message.
- `{code-block}` with `:caption: PATH`, or any block after `<!-- file: PATH -->`: the content of a file.
- any block after `<!-- not run: REASON -->` is only shown, and listed at the end.
- `…` as a line stands for any lines, within a line for any text: for times, digests and temporary paths.
- front matter `needs: checkpoint-alibi, alibi` (or a comment `<!-- needs: … -->`) puts the tiny checkpoint, or its
  export in fp32, into the folder of the page; the same with rotary.

`blocks` reads the code blocks of a page, `compare` compares output, `page` runs commands and Python for one page in a
virtual environment of its own, `worker` is its Python process, and `plugin` makes all of that tests of pytest.
"""
