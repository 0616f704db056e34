"""The choice of a kernel for a site: by rules, by predicted costs, or by measurements."""
