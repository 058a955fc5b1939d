"""Running a model around its blocks: what blocks are called with, and the checks that they may run one by one."""
