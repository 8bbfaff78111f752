"""The exit statuses of the command line, which are those of ``diff``."""

SAME, DIFFERS, TROUBLE, INTERRUPTED = 0, 1, 2, 130

#: What they mean, for the help.
MEANING = """exit status:
  0    done, and what was compared or checked is good
  1    compare: the captures differ; verify: a shard is bad; run --finite: a layer makes NaN or Inf
  2    the command failed, and one line on standard error says why
  130  it was interrupted (Ctrl-C)"""
