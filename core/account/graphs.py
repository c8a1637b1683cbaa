from core.account.graph import graphs as trace  # noqa: F401
