package server

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// recorded is one call that a real engine made (see testdata/README.md).
type recorded struct {
	Step string          `json:"step"`
	Path string          `json:"path"`
	Body json.RawMessage `json:"body"`
}

func readRecording(t *testing.T, file string) []recorded {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", file))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var calls []recorded
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var c recorded
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			t.Fatal(err)
		}
		calls = append(calls, c)
	}
	return calls
}

// replayer turns recorded bodies into those that the engine would have sent to
// us: with our pool IDs and addresses in place of the recording plugin's.
type replayer struct {
	pools map[string]string // recorded ID -> ours
	addrs map[string]string // recorded pool and address -> ours
	next  int               // the number that the recording plugin gave last
}

// body is the call's body for us, otherwise to the byte as it was recorded.
func (r *replayer) body(c recorded) string {
	if string(c.Body) == "null" {
		return ""
	}
	var in struct{ PoolID, Address string }
	_ = json.Unmarshal(c.Body, &in)
	body := string(c.Body)
	if ours := r.pools[in.PoolID]; ours != "" {
		body = strings.Replace(body, `"PoolID":`+quote(in.PoolID), `"PoolID":`+quote(ours), 1)
	}
	if ours := r.addrs[in.PoolID+" "+in.Address]; ours != "" && strings.HasSuffix(c.Path, "ReleaseAddress") {
		body = strings.Replace(body, `"Address":"`+in.Address+`"`, `"Address":"`+ours+`"`, 1)
	}
	return body
}

// learn takes our pool IDs and addresses from an answer.
func (r *replayer) learn(c recorded, answered string) {
	var in struct {
		Pool, PoolID, Address string
		V6                    bool
	}
	_ = json.Unmarshal(c.Body, &in)
	var out struct{ PoolID, Address string }
	_ = json.Unmarshal([]byte(answered), &out)
	switch {
	case strings.HasSuffix(c.Path, "RequestPool"):
		// Where no subnet was asked for, it gave out its usual one.
		r.pools[fmt.Sprintf("pool-%t-%s", in.V6, cmp.Or(in.Pool, "192.168.59.0/24"))] = out.PoolID
	case strings.HasSuffix(c.Path, "RequestAddress"):
		// It counted every request, and gave the number out where no address
		// was asked for.
		given := in.Address
		if given == "" && strings.HasPrefix(in.PoolID, "pool-true-") {
			given = fmt.Sprintf("fd00:59::%x", r.next)
		} else if given == "" {
			given = fmt.Sprintf("192.168.59.%d", r.next)
		}
		r.next++
		if prefix, err := netip.ParsePrefix(out.Address); err == nil {
			r.addrs[in.PoolID+" "+given] = prefix.Addr().String()
		}
	}
}

func TestReplay(t *testing.T) {
	// What must be refused: IPv6, and what follows from it. Everything else
	// succeeds.
	refused := map[string][]string{
		"engine-20.10.jsonl": {
			`RequestPool "fd00:59::/64": IPv6`,
			`RequestAddress "pool-true-fd00:59::/64": unknown pool`,
			`RequestAddress "pool-true-fd00:59::/64": unknown pool`,
		},
		"engine-29.jsonl": {
			`RequestPool "fd00:59::/64": IPv6`,
			`RequestAddress "pool-true-fd00:59::/64": unknown pool`,
		},
	}
	for file, refused := range refused {
		t.Run(file, func(t *testing.T) {
			store := &poolStore{pools: map[string]bool{}}
			d := startDaemon(t, store, usual)
			r := &replayer{pools: map[string]string{}, addrs: map[string]string{}, next: 10}
			endpoints := 0
			for i, c := range readRecording(t, file) {
				body := r.body(c)
				got := d.post(c.Path, body)
				var answer struct{ Error, Err string }
				if err := json.Unmarshal([]byte(got.body), &answer); err != nil || got.status != 200 {
					t.Fatalf("call %d, %s: %s %s answers %d %s", i, c.Step, c.Path, body, got.status, got.body)
				}
				if answer.Error != "" {
					var in struct{ Pool, PoolID string }
					_ = json.Unmarshal(c.Body, &in)
					call := fmt.Sprintf("%s %q: ", strings.TrimPrefix(c.Path, "/IpamDriver."), in.Pool+in.PoolID)
					at := slices.IndexFunc(refused, func(s string) bool {
						text, ok := strings.CutPrefix(s, call)
						return ok && strings.Contains(answer.Error, text)
					})
					if at < 0 {
						t.Errorf("call %d, %s: %s %s is refused: %s", i, c.Step, c.Path, body, answer.Error)
						continue
					}
					refused = slices.Delete(refused, at, at+1)
				} else if strings.HasSuffix(c.Path, "RequestAddress") && strings.Contains(body, macKey) {
					endpoints++
				}
				r.learn(c, got.body)
				if n := len(d.client.leased()); n != len(d.manager.Leases()) || n > 1 {
					t.Errorf("call %d, %s: leased are %v, known %v", i, c.Step, d.client.leased(), d.manager.Leases())
				}
			}
			if len(refused) != 0 {
				t.Errorf("not refused: %q", refused)
			}
			asked := d.client.asked()
			if len(asked) != endpoints || endpoints < 8 {
				t.Errorf("%d requests to the DHCP server for %d endpoints", len(asked), endpoints)
			}
			if got := d.client.leased(); len(got) != 0 || len(d.manager.Leases()) != 0 {
				t.Errorf("in the end %v is leased", got)
			}
			if ids := store.ids(); len(ids) != 0 {
				t.Errorf("in the end there is %q", ids)
			}
			learned := slices.DeleteFunc(d.client.probed(), func(p lease.Pool) bool { return p.Subnet.IsValid() })
			if named := strings.Contains(file, "29"); named != (len(learned) == 1) || named && learned[0].Options.Interface != "eth0" {
				t.Errorf("subnets were learned for %+v", learned)
			}
			checkAsked(t, asked, strings.Contains(file, "29"))
		})
	}
}

// checkAsked asserts on the conversation's endpoints as the recording has
// them: one asks for an address by --ip, engine 29 tells names. With 20.10 its
// MAC, by which it is known there, comes back later and asks for what it had.
func checkAsked(t *testing.T, asked []lease.Request, names bool) {
	t.Helper()
	byIP, want := 0, 2
	if names {
		want = 1
	}
	for _, r := range asked {
		if (r.Name != "") != names {
			t.Errorf("%s has the name %q", r.MAC, r.Name)
		}
		if r.Address.IsValid() {
			byIP++
			if r.Address.String() != "192.168.59.177" || r.MAC.String() != "02:42:c0:a8:3b:4d" {
				t.Errorf("%s asks for %s", r.MAC, r.Address)
			}
		}
		if r.Pool.Subnet.String() != "192.168.59.0/24" || r.Pool.Gateway.String() != "192.168.59.1" {
			t.Errorf("in pool %+v", r.Pool)
		}
	}
	if byIP != want {
		t.Errorf("%d endpoints ask for an address, want %d", byIP, want)
	}
}
