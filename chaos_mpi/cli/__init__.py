"""The command line tools: ``chaosrun`` starts a job, ``chaosctl`` looks at one."""
