// Package systemd does what systemd asks of a daemon: serve on the sockets that
// it passes, say what state one is in, prove to be alive, and log in journald's
// own protocol. Nothing here matters to a daemon that was started otherwise: it
// gets no sockets, tells nobody and has no watchdog. The units lie beside it.
package systemd
