"""Everything that touches NATS: topology, the one append, dispatch, the embedded server, control, reactors."""
