package dhcp

import (
	"errors"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

func openBroadcast(at place) (socket, error) { return socket{}, errors.New("not yet") }

func interfaceMAC(name string) (lease.MAC, error) { return lease.MAC{}, errors.New("not yet") }
