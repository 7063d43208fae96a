// Command hashlens-search encodes one image and prints its nearest neighbours.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	pb "example.org/hashlens-search/hashlensv1"
)

// Both services' own limit is this, and it is more than gRPC's default.
const maxMessageBytes = 64 << 20

type options struct {
	encoder, search, collection, image string
	tlsCA, tlsCert, tlsKey, tokenFile  string
	insecure                           bool
	k                                  uint
	deadline                           time.Duration
}

// bearer goes with every call. Without TLS others could read it, so that must be said to be fine.
type bearer struct {
	token    string
	insecure bool
}

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + b.token}, nil
}

func (b bearer) RequireTransportSecurity() bool { return !b.insecure }

func transportCredentials(o options) (credentials.TransportCredentials, error) {
	if (o.tlsCert == "") != (o.tlsKey == "") {
		return nil, errors.New("-tls-cert and -tls-key go together")
	}
	if o.tlsCA == "" {
		if o.tlsCert != "" {
			return nil, errors.New("-tls-cert needs -tls-ca")
		}
		return insecure.NewCredentials(), nil
	}
	authorities, err := os.ReadFile(o.tlsCA)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{RootCAs: x509.NewCertPool()}
	if !config.RootCAs.AppendCertsFromPEM(authorities) {
		return nil, fmt.Errorf("%s has no certificate", o.tlsCA)
	}
	if o.tlsCert != "" {
		pair, err := tls.LoadX509KeyPair(o.tlsCert, o.tlsKey)
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return credentials.NewTLS(config), nil
}

func dialOptions(o options) ([]grpc.DialOption, error) {
	transport, err := transportCredentials(o)
	if err != nil {
		return nil, err
	}
	dial := []grpc.DialOption{
		grpc.WithTransportCredentials(transport),
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(maxMessageBytes), grpc.MaxCallSendMsgSize(maxMessageBytes)),
	}
	if o.tokenFile != "" {
		token, err := os.ReadFile(o.tokenFile)
		if err != nil {
			return nil, err
		}
		dial = append(dial, grpc.WithPerRPCCredentials(
			bearer{token: strings.TrimSpace(string(token)), insecure: o.insecure}))
	}
	return dial, nil
}

func encode(ctx context.Context, o options, dial []grpc.DialOption) (*pb.Embedding, error) {
	image, err := os.ReadFile(o.image)
	if err != nil {
		return nil, err
	}
	connection, err := grpc.NewClient(o.encoder, dial...)
	if err != nil {
		return nil, err
	}
	defer connection.Close()
	reply, err := pb.NewEncoderServiceClient(connection).Encode(ctx, &pb.EncodeRequest{Image: image})
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", o.image, err)
	}
	return reply.Embedding, nil
}

func search(
	ctx context.Context, o options, dial []grpc.DialOption, embedding *pb.Embedding,
) (*pb.SearchResponse, error) {
	connection, err := grpc.NewClient(o.search, dial...)
	if err != nil {
		return nil, err
	}
	defer connection.Close()
	reply, err := pb.NewSearchServiceClient(connection).Search(ctx, &pb.SearchRequest{
		Collection: o.collection,
		Query:      &pb.Query{Query: &pb.Query_Embedding{Embedding: embedding}},
		Options:    &pb.SearchOptions{K: uint32(o.k)},
	})
	if err != nil {
		return nil, fmt.Errorf("search %s: %w", o.collection, err)
	}
	return reply, nil
}

func run(o options) error {
	dial, err := dialOptions(o)
	if err != nil {
		return err
	}
	// The servers drop work whose deadline has passed, so say what is meant.
	ctx, cancel := context.WithTimeout(context.Background(), o.deadline)
	defer cancel()
	embedding, err := encode(ctx, o, dial)
	if err != nil {
		return err
	}
	reply, err := search(ctx, o, dial, embedding)
	if err != nil {
		return err
	}
	for _, hit := range reply.Hits {
		fmt.Printf("%s\t%d bits", hit.Id, hit.HammingBits)
		if hit.Distance != nil {
			fmt.Printf("\t%.4f", *hit.Distance)
		}
		fmt.Println()
	}
	receipt := reply.Receipt
	fmt.Printf("exact: %t, within %d of %d bits, pool: %d\n",
		receipt.Exact, receipt.ThresholdBits, embedding.Code.NBits, receipt.PoolSize)
	return nil
}

func main() {
	log.SetFlags(0)
	log.SetPrefix("hashlens-search: ")
	var o options
	flag.StringVar(&o.encoder, "encoder", "127.0.0.1:50051", "where the encoder service is")
	flag.StringVar(&o.search, "search", "127.0.0.1:50052", "where the search service is")
	flag.StringVar(&o.collection, "collection", "photos", "what to search")
	flag.StringVar(&o.tlsCA, "tls-ca", "", "PEM file of who signs the services' certificates")
	flag.StringVar(&o.tlsCert, "tls-cert", "", "PEM file of a certificate to show; with -tls-ca")
	flag.StringVar(&o.tlsKey, "tls-key", "", "PEM file of its key")
	flag.StringVar(&o.tokenFile, "token-file", "",
		"file with a bearer token; needs -tls-ca or -insecure")
	flag.BoolVar(&o.insecure, "insecure", false,
		"send the token without TLS, for whoever is on the way to read")
	flag.UintVar(&o.k, "k", 10, "how many hits")
	flag.DurationVar(&o.deadline, "deadline", 10*time.Second, "time for both calls together")
	flag.Parse()
	if flag.NArg() != 1 {
		log.Fatal("give one image file")
	}
	o.image = flag.Arg(0)
	if err := run(o); err != nil {
		log.Fatal(err)
	}
}
