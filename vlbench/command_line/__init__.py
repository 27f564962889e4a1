"""The command line: what each verb takes, and the one parser of `key=value` words."""
