"""Which kernel serves a site: by rules, by predicted costs, or by measurements."""
