"""What both servers, and their clients, need of gRPC."""
