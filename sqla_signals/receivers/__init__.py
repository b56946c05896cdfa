"""Connected receivers: what they ask for, and who is called."""
