from penstock.engines.child.main import main

main()
