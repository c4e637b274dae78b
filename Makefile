# The doors of the project. What is behind them is in xtask/ ("cargo xtask help").
.DEFAULT_GOAL := help
.PHONY: help demo test lint bench fuzz install clean

# Seconds for each target of "make fuzz".
SECONDS ?= 60
# Where "make install" puts things, and the root that a package is made in.
PREFIX ?= /usr/local
DESTDIR ?=

help:
	@cargo xtask help

demo test lint bench clean:
	@cargo xtask $@

install:
	@cargo xtask install --to "$(DESTDIR)$(PREFIX)"

fuzz:
	@cargo xtask fuzz --seconds $(SECONDS)
