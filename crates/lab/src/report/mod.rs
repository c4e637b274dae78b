//! What a run's results look like to people: a page with plots and a table for the terminal.
