"""The only room that imports nvflare: executor, aggregator, controller, persistor, filter, job builder, simulator."""
