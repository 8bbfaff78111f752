"""The exit statuses of the command line, the same as those of ``diff``."""

SAME, DIFFERS, TROUBLE, INTERRUPTED = 0, 1, 2, 130

#: Their meaning, for the help.
MEANING = """exit status:
  0    the command succeeded, and so did its checks
  1    compare: the captures differ; verify: a shard is bad; run --finite: a layer produces NaN or Inf
  2    the command failed, and one line on standard error says why
  130  the command was interrupted (Ctrl-C)"""
