package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"runtime/debug"
	"strings"
	"time"

	"github.com/gorilla/mux"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Names of libnetwork's (ipamapi and netlabel).
const (
	mediaType      = "application/vnd.docker.plugins.v1.2+json"
	gatewayKey     = "com.docker.network.gateway" // type of an address request, and key of a pool's Data
	requestTypeKey = "RequestAddressType"
	macKey         = "com.docker.network.endpoint.macaddress"
	nameKey        = "com.docker.network.endpoint.name" // from engine 29.0 on
)

// The protocol's messages, the same from engine 20.10 to 29.
type (
	activation struct {
		Implements []string
	}
	capabilities struct {
		// RequiresMACAddress makes the engine choose the MAC before it asks
		// for an address. Docker's ipvlan refuses endpoints that have one.
		RequiresMACAddress bool
		// RequiresRequestReplay must be false: engines before 29 crash in a
		// loop when a replayed pool is refused, and replayed endpoints carry
		// no MAC. Pools persist here, so there is nothing to replay.
		RequiresRequestReplay bool
	}
	addressSpaces struct {
		LocalDefaultAddressSpace  string
		GlobalDefaultAddressSpace string
	}
	poolRequest struct {
		AddressSpace string
		Pool         string
		SubPool      string
		Options      map[string]string
		V6           bool
	}
	poolAnswer struct {
		PoolID string
		Pool   string
		Data   map[string]string
	}
	poolRelease struct {
		PoolID string
	}
	addressRequest struct {
		PoolID  string
		Address string
		Options map[string]string
	}
	addressAnswer struct {
		Address string
		Data    map[string]string
	}
	addressRelease struct {
		PoolID  string
		Address string
	}
	nothing struct{}
)

// driver answers the engine as one of its IPAM drivers.
type driver struct {
	manager *lease.Manager
	as      lease.Driver
	log     *slog.Logger
	repeats *repeats
}

func (d driver) route(r *mux.Router) {
	d.introduce(r)
	post(r, "/IpamDriver.RequestPool", call(d.log, d.requestPool))
	post(r, "/IpamDriver.ReleasePool", d.repeats.other(call(d.log, d.releasePool)))
	post(r, "/IpamDriver.RequestAddress", d.repeats.other(call(d.log, d.requestAddress)))
	post(r, "/IpamDriver.ReleaseAddress", d.repeats.other(call(d.log, d.releaseAddress)))
}

// introduce serves the calls by which an engine learns what the driver is. They
// need nothing that could fail: the engine keeps the answers until it restarts.
func (d driver) introduce(r *mux.Router) {
	post(r, "/Plugin.Activate", constant(activation{[]string{"IpamDriver"}}))
	post(r, "/IpamDriver.GetCapabilities", constant(capabilities{RequiresMACAddress: !d.as.SharedMAC}))
	// With two names, engines from 27 on ask again without end for a pool
	// that overlaps one of the host's routes.
	post(r, "/IpamDriver.GetDefaultAddressSpaces", d.repeats.other(constant(addressSpaces{d.as.Name, d.as.Name})))
}

func post(r *mux.Router, path string, h http.HandlerFunc) {
	r.Handle(path, h).Methods(http.MethodPost)
}

func (d driver) requestPool(ctx context.Context, r poolRequest) (poolAnswer, error) {
	if r.V6 && r.Pool == "" {
		return poolAnswer{}, errors.New("IPv6 pools are not served: this driver serves IPv4 only; create the network without --ipv6")
	}
	if err := d.repeats.check(r); err != nil {
		return poolAnswer{}, err
	}
	pool, err := lease.NewPool(r.Pool, r.SubPool, r.Options)
	if err != nil {
		return poolAnswer{}, err
	}
	pool.SharedMAC = d.as.SharedMAC
	pool, err = d.manager.AddPool(ctx, pool)
	if err != nil {
		return poolAnswer{}, err
	}
	d.repeats.answered(r, pool)
	gateway := netip.PrefixFrom(pool.Gateway, pool.Subnet.Bits())
	// As Data, the gateway reaches macvlan on every engine; from 29 on it
	// asks for none by itself and containers would have no default route.
	return poolAnswer{PoolID: pool.ID, Pool: pool.Subnet.String(), Data: map[string]string{gatewayKey: gateway.String()}}, nil
}

func (d driver) releasePool(ctx context.Context, r poolRelease) (nothing, error) {
	return nothing{}, d.manager.RemovePool(ctx, r.PoolID)
}

// requestAddress tells the three kinds of address requests apart: a gateway's
// has a type, an endpoint's a MAC, an auxiliary address's neither. Where MACs are
// shared, engines before 29 ask for an endpoint's --ip as for an auxiliary
// address, so there are none: a container without a lease would be worse.
func (d driver) requestAddress(ctx context.Context, r addressRequest) (addressAnswer, error) {
	addr, err := parseAddr(r.Address)
	if err != nil {
		return addressAnswer{}, err
	}
	var granted netip.Prefix
	switch mac := r.Options[macKey]; {
	case r.Options[requestTypeKey] == gatewayKey:
		granted, err = d.manager.Gateway(ctx, r.PoolID, addr)
	case mac == "" && !d.as.SharedMAC:
		granted, err = d.manager.Auxiliary(ctx, r.PoolID, addr)
	default:
		ep := lease.Endpoint{Name: strings.TrimPrefix(r.Options[nameKey], "/"), Address: addr}
		if mac != "" {
			if ep.MAC, err = lease.ParseMAC(mac); err != nil {
				return addressAnswer{}, err
			}
		}
		var l lease.Lease
		l, err = d.manager.Acquire(ctx, r.PoolID, ep)
		granted = l.Prefix
	}
	if err != nil {
		return addressAnswer{}, err
	}
	return addressAnswer{Address: granted.String()}, nil
}

func (d driver) releaseAddress(ctx context.Context, r addressRelease) (nothing, error) {
	addr, err := parseAddr(r.Address)
	if err != nil {
		return nothing{}, err
	}
	return nothing{}, d.manager.Release(ctx, r.PoolID, addr)
}

// parseAddr reads an address, or none.
func parseAddr(s string) (netip.Addr, error) {
	if s == "" {
		return netip.Addr{}, nil
	}
	addr, err := netip.ParseAddr(s)
	if err != nil {
		return addr, fmt.Errorf("parse address %q: want an IPv4 address such as 192.0.2.7", s)
	}
	return addr, nil
}

// constant answers calls that have no arguments and can't fail.
func constant(v any) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, v) }
}

// call makes a handler of a function: it decodes its argument, encodes its
// result, and puts its error into the form that the engine shows to the user.
func call[In, Out any](log *slog.Logger, f func(context.Context, In) (Out, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		began := time.Now()
		log := log.With("call", r.URL.Path)
		defer func() {
			if p := recover(); p != nil {
				log.Error("call panicked", "panic", p, "stack", string(debug.Stack()))
				answer(w, http.StatusInternalServerError, failure{Err: "internal error of oam-docker-ipam: see its log"})
			}
		}()
		body, err := readBody(w, r, bodyLimit)
		if err != nil {
			answer(w, http.StatusBadRequest, failure{Err: fmt.Sprintf("read request %s: %v", r.URL.Path, err)})
			return
		}
		log.Debug("call", "body", string(body))
		if len(bytes.TrimSpace(body)) == 0 {
			// The engine's own retry of a call whose connection broke has no
			// body any more. Whatever it asked for, it must not get a lease.
			answer(w, http.StatusOK, failure{Error: "request without a body: the engine repeats a call that was cut off; try again"})
			return
		}
		var in In
		if err := json.Unmarshal(body, &in); err != nil {
			answer(w, http.StatusBadRequest, failure{Err: fmt.Sprintf("parse request %s: %v", r.URL.Path, err)})
			return
		}
		out, err := f(r.Context(), in)
		if err != nil {
			log.Warn("call failed", "body", string(body), "after", time.Since(began), "error", err)
			answer(w, http.StatusOK, failure{Error: err.Error()})
			return
		}
		log.Debug("call done", "after", time.Since(began))
		answer(w, http.StatusOK, out)
	}
}

// answer writes JSON. A caller who is gone can't be told so.
func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", mediaType)
	w.WriteHeader(status)
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	_ = e.Encode(v)
}
