"""Where users already are: the library's parts for other frameworks, one file per framework."""
