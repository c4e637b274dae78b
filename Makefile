# The doors of the project. What is behind them is in xtask/ ("cargo xtask help").
.DEFAULT_GOAL := help
.PHONY: help demo test lint bench fuzz clean

# Seconds for each target of "make fuzz".
SECONDS ?= 60

help:
	@cargo xtask help

demo test lint bench clean:
	@cargo xtask $@

fuzz:
	@cargo xtask fuzz --seconds $(SECONDS)
