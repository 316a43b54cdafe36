package server

import (
	"context"
	"net/http"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

const examinePath = operatorPath + "doctor"

// Examined is what the daemon holds, whole, as the doctor needs it. Other
// programs have Leases and Pools, whose form stays the same.
type Examined struct {
	Pools  []lease.PoolStatus `json:"pools"`
	Leases []lease.Held       `json:"leases"`
}

func (o operator) examine(w http.ResponseWriter, _ *http.Request) {
	answer(w, http.StatusOK, Examined{Pools: o.Manager.Pools(), Leases: o.Manager.Leases()})
}

// Examine asks the daemon on a socket for all that it holds.
func Examine(ctx context.Context, socket string) (Examined, error) {
	var e Examined
	err := ask(ctx, socket, http.MethodGet, examinePath, nil, &e)
	return e, err
}

// Activate asks what answers on a plugin's socket what it is, as an engine does
// when it first meets a plugin. It changes nothing.
func Activate(ctx context.Context, socket string) (implements []string, err error) {
	var manifest struct{ Implements []string }
	err = ask(ctx, socket, http.MethodPost, "/Plugin.Activate", nil, &manifest)
	return manifest.Implements, err
}
