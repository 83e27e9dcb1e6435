"""The `zerofleet` command: argv to one call, its result to text or JSON. Only here is anything printed."""
