-- Pass a wake-up on: the claimant it was for no longer waits. ARGV: 3 model.
tick()
ring(ARGV[3])
return { 0, {} }
